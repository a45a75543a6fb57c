"""Mixture of experts: the layer, its routers, and losses and statistics for a balanced load."""
