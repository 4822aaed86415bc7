"""Pure torch: the GPT, the item table and the losses. Knows no device and no rank."""
