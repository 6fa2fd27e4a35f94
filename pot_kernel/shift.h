// Products of power-of-two weights and 8-bit activations by shifts and additions alone, for processors without a
// multiplier. The header needs no library: it also compiles for a bare RV32I core, whose instructions have no
// multiplication (test_run.py looks at them).
//
//     clang --target=riscv32 -march=rv32i -ffreestanding -O2 -S -x c shift.h
//
// A level of the grid is a power of two, or the sum of two. So x * level is x shifted once, or twice and added.

#include <stdint.h>

struct PotShift {        // how to multiply by the level of a code
    uint8_t first;       // places to shift for the first power
    uint8_t second;      // and for the second
    int8_t has_first;    // -1 (all bits): the level has a first power; 0: it is zero
    int8_t has_second;   // -1: it has a second one
    int32_t negative;    // -1: the level is below zero; 0: it is not
};

// Writes how to multiply by a level. Returns 0, or -1 if the level has more than two powers.
static inline int pot_shift_of(int32_t level, struct PotShift* out) {
    int32_t size = level < 0 ? -level : level;
    uint8_t places[2] = {0, 0}, count = 0, place = 0;
    for (; size; size >>= 1, place++)
        if (size & 1) {
            if (count == 2) return -1;
            places[count++] = place;
        }
    out->first = places[0], out->second = places[1];
    out->has_first = count > 0 ? -1 : 0, out->has_second = count > 1 ? -1 : 0;
    out->negative = level < 0 ? -1 : 0;
    return 0;
}

// x times a level.
static inline int32_t pot_shift(int32_t x, const struct PotShift* level) {
    const uint32_t bits = (uint32_t)x;  // shifting a negative number is defined only for unsigned types
    const uint32_t sum = (bits << level->first & (uint32_t)(int32_t)level->has_first) +
                         (bits << level->second & (uint32_t)(int32_t)level->has_second);
    return (int32_t)((sum ^ (uint32_t)level->negative) - (uint32_t)level->negative);
}

// Adds to sums (16) the products of x (columns) and `columns` codes of 16 rows, from `column` on. column and columns are
// multiples of 4. codes: the tiles of these rows as pot.cpp describes them, of 3 or 4 bits. levels: (codes).
static inline void pot_shift_products(const uint8_t* codes, int bits, int32_t column, int32_t columns, const int8_t* x,
                                      const struct PotShift* levels, int32_t* sums) {
    for (int32_t c = column; c < column + columns; c += 4, x += 4) {
        // A tile of 4 bits has 8 columns and 64 bytes, one of 3 bits 32 columns and 3 times 64 bytes.
        const uint8_t* tile = bits == 4 ? codes + (c >> 3 << 6) : codes + (c >> 5 << 7) + (c >> 5 << 6);
        for (int lane = 0; lane < 64; lane += 4)
            for (int b = 0; b < 4; b++) {
                int code;
                if (bits == 4)
                    code = tile[lane + b] >> (c & 4) & 15;
                else
                    code = (tile[(c & 16 ? 64 : 0) + lane + b] >> (c >> 1 & 6) & 3) |
                           (tile[128 + lane + b] >> (c >> 2 & 7) & 1) << 2;
                sums[lane >> 2] += pot_shift(x[b], &levels[code]);
            }
    }
}
