"""Words and pictures in, tokens and uint8 pixels out: the one road for training records and chat messages."""
