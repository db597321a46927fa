"""What tests need beyond the extra `test`."""

pytest_plugins = ["tests.extras"]
