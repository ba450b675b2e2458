"""What a student learns from: text, or a teacher's distribution, run, recorded, or on its own samples."""
