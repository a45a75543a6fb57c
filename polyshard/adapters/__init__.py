"""One package per parallelism library, each with the same modules; imported on first use, through entry points."""
