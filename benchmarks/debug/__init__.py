"""Where a program that diverges goes wrong: the launch, the layer or the site, with Polygraphy."""
