"""vLLM engines that polyshard starts: rollouts, scoring and sampling."""
