"""Text and task documents: what is calibrated on and what is measured on."""
