"""Collectives and what is sharded over ranks: the item table and its optimizer."""
