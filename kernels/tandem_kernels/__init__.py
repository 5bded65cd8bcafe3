"""The operations of a forward pass, one per file. The torch reference defines what is right."""
