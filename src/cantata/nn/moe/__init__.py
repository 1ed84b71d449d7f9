"""Mixture of experts: router, dispatcher, experts, the layer of all three, and its balance."""
