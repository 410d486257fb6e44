"""From rows in a file to tensors: conversation -> formats -> templates -> tokenize -> packing -> collate."""
