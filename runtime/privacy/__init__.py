"""Nothing leaves the device: libraries' telemetry off, a sealed process, and the proof of it."""
