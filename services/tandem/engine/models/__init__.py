"""The decoder that every supported model shares, and one small file per architecture."""
