"""What several test files share: stand-ins for libraries and machines."""
