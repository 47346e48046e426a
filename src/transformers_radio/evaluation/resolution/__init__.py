"""One model at many resolutions."""
