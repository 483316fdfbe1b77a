"""What stands between a model and the world: tools over the Model Context Protocol (MCP)."""
