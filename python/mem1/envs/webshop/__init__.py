"""WebShop (Yao et al., 2022): buy what an instruction asks for, in a shop of text pages."""
