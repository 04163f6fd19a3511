"""What test authors get: conformance checks for any backend, a pytest plugin."""
