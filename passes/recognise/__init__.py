"""Recognising what exporters decompose: attention, masks, norms, rotary embeddings, activations."""
