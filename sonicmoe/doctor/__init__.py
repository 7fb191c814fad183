"""``sonicmoe doctor``: is this machine fit to run the layer at speed, and if not, what to do. Imports neither torch nor the compiler."""
