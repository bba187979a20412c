"""Judge by experiment: trainings that differ in one thing, stored as they finish, and the statistics over them."""
