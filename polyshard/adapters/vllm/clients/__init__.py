"""Clients of vLLM engines: in this process or its children, behind vLLM's HTTP server, or in a Ray actor."""
