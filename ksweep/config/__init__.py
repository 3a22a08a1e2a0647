"""What a user requests: the spec, a sweep, resources, overrides, presets."""
