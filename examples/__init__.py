"""Sample programs in other languages; `edifice-export scaffold` copies them. `check` tests them."""
