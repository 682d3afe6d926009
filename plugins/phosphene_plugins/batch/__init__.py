"""Plans: many models, methods and pictures in one resumable run, and a report of what came out."""
