"""How models and their training state are split over ranks."""
