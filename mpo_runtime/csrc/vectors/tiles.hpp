// The tile registers of AMX. Included behind MPO_BEGIN_TARGET.
#pragma once

namespace mpo {
namespace {

// Bytes of a row and rows of each of the 8 tiles, as the CPU reads them.
struct alignas(64) TileShapes {
  std::uint8_t palette = 1, start = 0, reserved[14] = {};
  std::uint16_t bytes[16] = {};
  std::uint8_t rows[16] = {};
};

// All 8 tiles have 16 rows of 64 bytes as long as it lives.
class Tiles {
 public:
  Tiles() {
    for (int i = 0; i < 8; ++i) shapes_.bytes[i] = 64, shapes_.rows[i] = 16;
    __asm__ volatile("" : : "r"(&shapes_) : "memory");  // gcc 12 drops the stores to shapes_ without it
    _tile_loadconfig(&shapes_);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  TileShapes shapes_;
};

}  // namespace
}  // namespace mpo
