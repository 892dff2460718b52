"""Small adapters that other libraries ask for. Each imports its library when it is called, not before."""
