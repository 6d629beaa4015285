"""Ways of running one network side by side, and the roofline they run under."""
