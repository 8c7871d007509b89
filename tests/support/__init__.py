"""What tests share: helpers, models, published signatures, oracles."""
