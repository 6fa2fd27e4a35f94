// Units that multiply an activation by a weight and add the product to a sum, one product a clock.
//
//     unit            activation    weight                                         sum
//     mac_int8        int8          int8, -128 to 127                              26 bits
//     mac_int4        int8          int4, -8 to 7                                  22 bits
//     mac_uniform     int8          4-bit code of pot.py, grid="uniform": 0 to 7   21 bits
//     mac_pot         int8          4-bit code of pot.py: 0, 1, 2, 4, ..., 64      25 bits
//     mac_two         int8          4-bit code of pot.py, terms=2: 0 to 12         22 bits
//     mac_float16     float16       float16                                        float32
//     mac_bfloat16    bfloat16      bfloat16                                       float32
//
// A 4-bit code of pot.py is `sign << 3 | index`. Index 0 is zero with either sign.
// A sum is as wide as 1,024 products need, whatever they are. hardware.py derives the width from the weights' levels.
// With activations of -128: 1,024 * 128 * 64 = 2^23 for single powers, and +2^23 needs 25 bits.
//
// product_* gives product and carry, where activation * weight = product + carry. Negation is ~p + 1: the carry leaves
// the 1 to the adder of the sum, which has room for it.

module accumulator #(parameter PRODUCT = 16, SUM = 26) (
  input clk, input clear, input signed [PRODUCT-1:0] product, input carry, output reg signed [SUM-1:0] sum
);
  always @(posedge clk)
    if (clear) sum <= 0;
    else sum <= sum + product + $signed({1'b0, carry});
endmodule

// -----------------------------------------------------------------------------
// Products of an int8 activation

module product_int8 (input signed [7:0] x, input signed [7:0] w, output signed [15:0] product, output carry);
  assign product = x * w;
  assign carry = 0;
endmodule

module product_int4 (input signed [7:0] x, input signed [3:0] w, output signed [11:0] product, output carry);
  assign product = x * w;
  assign carry = 0;
endmodule

// Written as three shifted copies of x, which takes fewer gates than Yosys' own multiplier does here.
module product_uniform (input signed [7:0] x, input [3:0] w, output signed [10:0] product, output carry);
  wire signed [7:0] one = x & {8{w[0]}};
  wire signed [8:0] two = {x & {8{w[1]}}, 1'b0};
  wire signed [9:0] four = {x & {8{w[2]}}, 2'b0};
  wire signed [10:0] high = four + two;
  wire signed [10:0] magnitude = high + one;
  assign product = magnitude ^ {11{w[3]}};
  assign carry = w[3];
endmodule

// x << (index - 1). Three steps shift x right by one and left by `index`: the first one by 0 or -1, then 2 and 4.
// The sign flips the 8 bits of x, not the 14 of the product, so the bits that a shift brings in are the sign.
module product_pot (input signed [7:0] x, input [3:0] w, output signed [13:0] product, output carry);
  wire nonzero = |w[2:0];
  wire sign = w[3] & nonzero;
  wire [7:0] a = (x ^ {8{sign}}) & {8{nonzero}};
  wire top = a[7];
  wire [8:0] b = w[0] ? {a, sign} : {top, a};
  wire [10:0] c = w[1] ? {b, {2{sign}}} : {{2{top}}, b};
  wire [14:0] d = w[2] ? {c, {4{sign}}} : {{4{top}}, c};
  assign product = d[14:1];
  assign carry = sign;
endmodule

// The code is FP4 E2M1: exponent w[2:1], mantissa w[0]. Its level is 0 or 1 at exponent 0, else (2 + mantissa) shifted
// left by exponent - 1. So two terms, 2x and x, are added and then shifted.
module product_two (input signed [7:0] x, input [3:0] w, output signed [11:0] product, output carry);
  wire nonzero = |w[2:0];
  wire sign = w[3] & nonzero;
  wire signed [8:0] first = {x, 1'b0} & {9{|w[2:1]}};
  wire signed [7:0] second = x & {8{w[0]}};
  wire signed [9:0] terms = first + second;
  wire signed [11:0] shifted = w[2:1] == 3 ? terms <<< 2 : w[2:1] == 2 ? terms <<< 1 : terms;
  assign product = shifted ^ {12{sign}};
  assign carry = sign;
endmodule

// -----------------------------------------------------------------------------
// Units with an int8 activation

module mac_int8 (input clk, input clear, input signed [7:0] x, input signed [7:0] w, output signed [25:0] sum);
  wire signed [15:0] product;
  wire carry;
  product_int8 multiply (x, w, product, carry);
  accumulator #(16, 26) add (clk, clear, product, carry, sum);
endmodule

module mac_int4 (input clk, input clear, input signed [7:0] x, input signed [3:0] w, output signed [21:0] sum);
  wire signed [11:0] product;
  wire carry;
  product_int4 multiply (x, w, product, carry);
  accumulator #(12, 22) add (clk, clear, product, carry, sum);
endmodule

module mac_uniform (input clk, input clear, input signed [7:0] x, input [3:0] w, output signed [20:0] sum);
  wire signed [10:0] product;
  wire carry;
  product_uniform multiply (x, w, product, carry);
  accumulator #(11, 21) add (clk, clear, product, carry, sum);
endmodule

module mac_pot (input clk, input clear, input signed [7:0] x, input [3:0] w, output signed [24:0] sum);
  wire signed [13:0] product;
  wire carry;
  product_pot multiply (x, w, product, carry);
  accumulator #(14, 25) add (clk, clear, product, carry, sum);
endmodule

module mac_two (input clk, input clear, input signed [7:0] x, input [3:0] w, output signed [21:0] sum);
  wire signed [11:0] product;
  wire carry;
  product_two multiply (x, w, product, carry);
  accumulator #(12, 22) add (clk, clear, product, carry, sum);
endmodule

// -----------------------------------------------------------------------------
// Units of floating-point numbers, for scale: an exact product, and a float32 sum rounded to nearest even. To keep them
// small, subnormal numbers count as zero, and infinities and NaN do not exist. A sum of float16 products cannot
// overflow float32; one of bfloat16 products can, and is then wrong.

// EXPONENT and MANTISSA: bits of the inputs. product is a float32 number.
module product_float #(parameter EXPONENT = 5, MANTISSA = 10) (
  input [EXPONENT+MANTISSA:0] x, input [EXPONENT+MANTISSA:0] w, output [31:0] product
);
  localparam BIAS = (1 << (EXPONENT - 1)) - 1;
  wire [EXPONENT-1:0] ex = x[EXPONENT+MANTISSA-1:MANTISSA], ew = w[EXPONENT+MANTISSA-1:MANTISSA];
  wire [2*MANTISSA+1:0] m = {1'b1, x[MANTISSA-1:0]} * {1'b1, w[MANTISSA-1:0]};
  wire carry = m[2*MANTISSA+1];  // the product of two significands is in [1, 4)
  wire [23:0] significand = {carry ? m : m << 1, {(22-2*MANTISSA){1'b0}}};
  wire signed [10:0] e = $signed({1'b0, ex}) + $signed({1'b0, ew}) + $signed({1'b0, carry}) + (127 - 2 * BIAS);
  wire zero = ex == 0 || ew == 0 || e <= 0;
  assign product = zero ? 32'b0 : {x[EXPONENT+MANTISSA] ^ w[EXPONENT+MANTISSA], e[7:0], significand[22:0]};
endmodule

module float32_add (input [31:0] a, input [31:0] b, output [31:0] total);
  wire swap = b[30:0] > a[30:0];
  wire [31:0] large = swap ? b : a, small = swap ? a : b;
  wire [7:0] distance = large[30:23] - small[30:23];
  wire [23:0] ml = {large[30:23] != 0, large[22:0]}, ms = small[30:23] == 0 ? 24'b0 : {1'b1, small[22:0]};
  // The smaller number, with two more bits and a third that tells whether any lower bit is set
  wire [49:0] wide = distance > 26 ? {49'b0, |ms} : {ms, 26'b0} >> distance[4:0];
  wire [26:0] aligned = {wide[49:24], |wide[23:0]};
  wire subtract = a[31] ^ b[31];
  wire [27:0] m = {1'b0, ml, 3'b0} + ({1'b0, aligned} ^ {28{subtract}}) + subtract;
  // Shift the leading 1 to the top
  wire z4 = m[27:12] == 0;
  wire [27:0] n4 = z4 ? m << 16 : m;
  wire z3 = n4[27:20] == 0;
  wire [27:0] n3 = z3 ? n4 << 8 : n4;
  wire z2 = n3[27:24] == 0;
  wire [27:0] n2 = z2 ? n3 << 4 : n3;
  wire z1 = n2[27:26] == 0;
  wire [27:0] n1 = z1 ? n2 << 2 : n2;
  wire z0 = n1[27] == 0;
  wire [27:0] n = z0 ? n1 << 1 : n1;
  wire signed [9:0] e = $signed({2'b0, large[30:23]}) + 1 - $signed({5'b0, z4, z3, z2, z1, z0});
  wire up = n[3] & (|n[2:0] | n[4]);
  wire [30:0] rounded = {e[7:0], n[26:4]} + up;
  assign total = !n[27] || e <= 0 ? 32'b0 : {large[31], rounded};
endmodule

module mac_float16 (input clk, input clear, input [15:0] x, input [15:0] w, output reg [31:0] sum);
  wire [31:0] product, total;
  product_float #(5, 10) multiply (x, w, product);
  float32_add add (sum, product, total);
  always @(posedge clk) if (clear) sum <= 0; else sum <= total;
endmodule

module mac_bfloat16 (input clk, input clear, input [15:0] x, input [15:0] w, output reg [31:0] sum);
  wire [31:0] product, total;
  product_float #(8, 7) multiply (x, w, product);
  float32_add add (sum, product, total);
  always @(posedge clk) if (clear) sum <= 0; else sum <= total;
endmodule
