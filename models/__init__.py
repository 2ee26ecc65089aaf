"""What the offline and the online half share: the guarded model, its bundle, the screening rule."""
