"""What we run to steer the project, and what we make of it; none of it is in the wheel."""
