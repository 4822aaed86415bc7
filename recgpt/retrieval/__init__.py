"""Autoregressive recall: from a trained model to candidate lists."""
