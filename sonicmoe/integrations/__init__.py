"""Where other libraries' models meet this one. Each module needs its library, and is imported by whoever wants it."""
