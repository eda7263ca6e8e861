"""What tests and studies share: tiny models, emulations, a toy backend."""
