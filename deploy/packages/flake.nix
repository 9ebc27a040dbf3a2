# Builds and runs Keychoir with Nix, from the source code of this repository:
#
#     nix run 'git+file:.?dir=deploy/packages' -- demo
#
# The flake was not tested with Nix: the tests check only its syntax. The first run writes a flake.lock, which the
# repository does not contain. nixpkgs must have at least the Rust version in Cargo.toml.
{
  description = "Transparent reverse proxy with one base URL for all your ElevenLabs API keys";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixpkgs-unstable";

  outputs = { self, nixpkgs }:
    let
      systems = [ "x86_64-linux" "aarch64-linux" "aarch64-darwin" ];
      forEachSystem = build: nixpkgs.lib.genAttrs systems (system: build nixpkgs.legacyPackages.${system});
      manifest = (builtins.fromTOML (builtins.readFile ../../Cargo.toml)).package;
    in
    {
      packages = forEachSystem (pkgs: rec {
        keychoir = pkgs.rustPlatform.buildRustPackage {
          pname = manifest.name;
          version = manifest.version;
          src = ../..;
          cargoLock.lockFile = ../../Cargo.lock;
          # The tests need PostgreSQL, Redis and other programs. `make test` runs them.
          doCheck = false;
          nativeBuildInputs = [ pkgs.installShellFiles ];
          postInstall = ''
            $out/bin/keychoir man $out/share/man/man1
            for shell in bash zsh fish; do
              $out/bin/keychoir completions $shell >keychoir.$shell
            done
            installShellCompletion keychoir.{bash,zsh,fish}
          '';
          meta = {
            description = manifest.description;
            license = with nixpkgs.lib.licenses; [ mit asl20 ];
            mainProgram = manifest.name;
          };
        };
        default = keychoir;
      });
    };
}
