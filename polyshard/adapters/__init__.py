"""One folder per parallelism library, each with the same rooms; imported on first use, through entry points."""
