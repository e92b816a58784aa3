"""Sample programs in other languages, with a bundle beside them."""
