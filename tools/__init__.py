"""Developer tools: fetched guests, initial file systems, boots."""
