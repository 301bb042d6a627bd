"""The shard plan, the ranks that obey it and how they talk."""
