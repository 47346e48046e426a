"""The models under evaluation: specifications, students, teachers, text encoders."""
