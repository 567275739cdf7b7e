"""unvanish: see, explain and cure vanishing gradients in recurrent networks."""
