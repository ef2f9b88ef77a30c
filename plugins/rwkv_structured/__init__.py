"""Text that keeps to a JSON schema, a regular expression or a grammar; needs the extra `structured`."""
