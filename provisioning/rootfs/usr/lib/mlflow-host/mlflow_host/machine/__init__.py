"""Code that all processes on the machine share: configuration, boot status, nginx, AWS calls, crash-safe writes."""
