"""What a configuration will need: memory, arithmetic, time."""
