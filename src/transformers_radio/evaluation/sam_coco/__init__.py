"""SAM-COCO: box-prompted masks."""
