"""The server of mpo-run: an HTTP interface in OpenAI's form, and a page to talk to a model in a browser."""
