"""Models: the decoder, written once against the op set, and a file for each model_type that says what differs."""
