"""Linear segmentation probe and open-vocabulary segmentation."""
