"""Small adapters for other libraries. Each imports its library only when called."""
