"""What can be asked: the spec, a sweep, resources, overrides, presets."""
