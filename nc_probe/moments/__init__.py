"""How features are summed: class moments in one pass, and what needs the final class means in a second."""
